"""Exports of a trained adapter: the adapter itself and the merged model. Import the submodules."""
