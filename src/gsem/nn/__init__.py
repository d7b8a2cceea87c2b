"""Networks: the GSeM module and its insertion, the backbones, the folded model, predictions over draws, loading."""
