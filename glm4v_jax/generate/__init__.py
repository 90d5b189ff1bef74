"""Generation: what to ask for (`config`), how a next token is chosen (`sampling`), and the loop that does it."""
