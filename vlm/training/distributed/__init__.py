"""A training on several processes: who does what, how they agree, how they are started. Import the submodules."""
