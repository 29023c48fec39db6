"""What the ablation notebooks compute: recipe variants, other data, costs, and what students see."""
