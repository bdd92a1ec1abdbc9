"""A machine in simulated time: the code that divides work runs, what it divides takes time only."""
