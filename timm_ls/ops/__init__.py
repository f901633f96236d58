"""How window attention and sums over tokens are computed: pure functions over tensors, no parameters."""
