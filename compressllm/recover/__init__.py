"""Recovery: training that gives a pruned model its accuracy back."""
