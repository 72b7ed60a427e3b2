"""Many runs from one file: grids and searches."""
