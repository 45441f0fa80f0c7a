"""Pages and gates from what runs left: nothing here computes with a model, nor imports torch."""
