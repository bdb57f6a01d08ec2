"""What `peftkern finetune` and `peftkern compare` share: data, the Trainer set-up, evaluation, defaults, reports."""
