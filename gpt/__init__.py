"""The model, and what is done with one that is trained."""
