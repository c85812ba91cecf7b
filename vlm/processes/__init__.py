"""Several processes for one piece of work, started through torch's elastic launcher. Import the submodules."""
