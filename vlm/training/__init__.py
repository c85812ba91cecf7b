"""The training plan, the collator and the training itself. Import the submodules."""
