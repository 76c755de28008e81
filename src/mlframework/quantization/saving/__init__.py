"""One file that a converted or a prepared model is kept in."""
