"""A page to look at, and pictures for papers."""
