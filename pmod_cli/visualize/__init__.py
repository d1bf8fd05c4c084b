"""``pmod visualize``: where vision tokens lie on a picture, and which of them each layer kept."""
