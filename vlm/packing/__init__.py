"""Several conversations in one row without padding, none of which sees another. Import the submodules."""
