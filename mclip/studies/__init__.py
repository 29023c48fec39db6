"""What the ablation notebooks compute: recipe variants, other data, costs, students' views."""
