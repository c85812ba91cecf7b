"""LoRA adapters: which modules are adapted, the initial adapter, strict loading. Import the submodules."""
