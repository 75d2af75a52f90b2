"""What ``kvtuner evaluate`` measures: KL on text, generation, needles and quotes, and the passes that take them."""
