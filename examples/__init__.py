"""Training scripts for MoKA with the libraries that PEFT is used with; each file stands for itself."""
