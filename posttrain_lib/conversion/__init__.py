"""Finding the definition of an architecture that the project does not have: agents that propose, a gate that judges."""
