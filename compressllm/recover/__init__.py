"""Recovery training: a pruned model is trained back towards its dense teacher, and its zeros stay zeros."""
