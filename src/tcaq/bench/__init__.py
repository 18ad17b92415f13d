"""Speed, memory, size and fidelity of one model in every runtime that is at hand, measured in one run."""
