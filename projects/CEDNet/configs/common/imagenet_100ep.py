"""The recipe in 100 epochs, as for the paper's ablations (Tables 4 and 6)."""

from .imagenet import classifier, dataloader, optimizer, schedule, settings

lr_multiplier = schedule(100)
train = settings(100)
