"""How `gearshift bench kernels` measures one op at one shape."""
