"""What the recipes share: data, models, optimizers, plans, processes, and the records of a run."""
