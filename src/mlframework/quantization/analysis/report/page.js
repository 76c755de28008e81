"use strict";

// Tables: a click on a header sorts by its column, another one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.querySelectorAll("th")];
  headers.forEach((header, column) => header.addEventListener("click", () => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    headers.forEach(other => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const compare = header.classList.contains("number")
      ? (one, other) => Number(key(one)) - Number(key(other))
      : (one, other) => key(one).localeCompare(key(other));
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((one, other) => (descending ? -1 : 1) * compare(one, other));
    body.append(...rows);
  }));
}

// Panels that show one of many figures at a time.
const options = { responsive: true, displaylogo: false };
for (const panel of document.querySelectorAll(".choice")) {
  const figures = JSON.parse(panel.querySelector("script").textContent);
  const select = panel.querySelector("select");
  const place = panel.querySelector(".place");
  const show = () => {
    const figure = figures[select.value];
    Plotly.react(place, figure.data, figure.layout, options);
  };
  select.addEventListener("change", show);
  show();
}

// A click on a layer shows its histogram.
const tensors = document.querySelector("#tensors select");
for (const cell of document.querySelectorAll("td.layer")) {
  cell.addEventListener("click", () => {
    const option = tensors && [...tensors.options].find(each => each.dataset.layer === cell.dataset.value);
    if (!option) return;
    tensors.value = option.value;
    tensors.dispatchEvent(new Event("change"));
    document.querySelector("#tensors").scrollIntoView({ behavior: "smooth" });
  });
}
