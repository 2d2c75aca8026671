"""From rows to packed batches: formats, rendering and masks, checks, token stores, packing, loading."""
