"""The backward engine: row schedule, passes, intermediate bounds, affine forms, communication."""
