// Programs are kept here under numbers, by which Python knows them: what a program is made of outlasts a call, and no
// dispatcher has to unpack it for each.
#include "program.h"

#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "operators.h"

namespace kernels {
namespace {

struct Program {
  int64_t inputs;
  std::vector<Instruction> instructions;
  std::vector<int64_t> outputs;
};

class Programs {
 public:
  int64_t add(std::shared_ptr<const Program> program) {
    const std::lock_guard<std::mutex> guard(mutex_);
    programs_.emplace(++last_, std::move(program));
    return last_;
  }

  void remove(int64_t number) {
    // Let go without the lock: freeing a tensor may run Python, which may release another program.
    std::shared_ptr<const Program> removed;
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = programs_.find(number);
    if (found == programs_.end()) return;
    removed = std::move(found->second);
    programs_.erase(found);
  }

  // A call keeps its program, whoever removes it meanwhile.
  std::shared_ptr<const Program> get(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = programs_.find(number);
    STD_TORCH_CHECK(found != programs_.end(), "program must come from make_program, got ", number);
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Program>> programs_;
  int64_t last_ = 0;
};

Programs& programs() {
  static Programs* const kept = new Programs;  // never destroyed: tensors may outlive this library's statics
  return *kept;
}

// Reads numbers one after the other, and counted groups of them.
class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& numbers) : numbers_(numbers) {}

  bool is_at_end() const { return place_ == numbers_.size(); }
  int64_t next() {
    STD_TORCH_CHECK(place_ < numbers_.size(), "code must say of every instruction what it reads");
    return numbers_[place_++];
  }
  std::vector<int64_t> group() {
    std::vector<int64_t> result;
    for (int64_t left = next(); left > 0; --left) result.push_back(next());
    return result;
  }

 private:
  const std::vector<int64_t>& numbers_;
  size_t place_ = 0;
};

void check_values(const std::vector<int64_t>& values, int64_t count) {
  for (int64_t value : values)
    STD_TORCH_CHECK(0 <= value && value < count, "code must name values below ", count, ", got ", value);
}

// Notes with each instruction what no later one reads, and the program does not return.
void note_last_reads(Program& program) {
  std::vector<bool> read(static_cast<size_t>(program.inputs) + program.instructions.size());
  for (int64_t value : program.outputs) read[static_cast<size_t>(value)] = true;
  for (size_t place = program.instructions.size(); place-- > 0;) {
    Instruction& instruction = program.instructions[place];
    for (int64_t value : instruction.inputs)
      if (!read[static_cast<size_t>(value)]) {
        read[static_cast<size_t>(value)] = true;
        instruction.unread.push_back(value);
      }
  }
}

}  // namespace

int64_t make_program(int64_t inputs, Shape code, std::vector<Tensor> tensors, Shape outputs) {
  const auto program = std::make_shared<Program>();
  program->inputs = inputs;
  Reader reader(code);
  size_t constants = 0;
  while (!reader.is_at_end()) {
    // A name as numbers: of every string, PyTorch's stable interface keeps a copy for good.
    const std::vector<int64_t> letters = reader.group();
    const std::string name(letters.begin(), letters.end());
    Instruction instruction;
    instruction.inputs = reader.group();
    check_values(instruction.inputs, inputs + static_cast<int64_t>(program->instructions.size()));
    for (int64_t left = reader.next(); left > 0; --left) {
      STD_TORCH_CHECK(constants < tensors.size(), "tensors must be as many as code says");
      instruction.tensors.push_back(tensors[constants++]);
    }
    instruction.numbers = reader.group();
    set_function(instruction, name);
    program->instructions.push_back(std::move(instruction));
  }
  check_values(outputs, inputs + static_cast<int64_t>(program->instructions.size()));
  program->outputs = std::move(outputs);
  note_last_reads(*program);
  return programs().add(program);
}

void release_program(int64_t number) { programs().remove(number); }

std::vector<Tensor> run_program(std::vector<Tensor> inputs, int64_t number) {
  const std::shared_ptr<const Program> program = programs().get(number);
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program->inputs, "inputs must be ", program->inputs,
                  " tensors, got ", inputs.size());
  std::vector<std::optional<Tensor>> values(inputs.begin(), inputs.end());
  values.reserve(inputs.size() + program->instructions.size());
  inputs.clear();
  std::vector<const Tensor*> read;
  for (const Instruction& instruction : program->instructions) {
    read.clear();
    for (int64_t value : instruction.inputs) read.push_back(&*values[static_cast<size_t>(value)]);
    values.emplace_back(instruction.function(instruction, read));
    for (int64_t value : instruction.unread) values[static_cast<size_t>(value)].reset();
  }
  std::vector<Tensor> results;
  for (int64_t value : program->outputs) results.push_back(*values[static_cast<size_t>(value)]);
  return results;
}

}  // namespace kernels
