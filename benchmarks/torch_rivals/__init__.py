"""PyTorch's side of the speed questions, as its best friend would write it. Needs torch, and never enters the package."""
