"""The recipe that fine-tunes an image classifier: `hf-dpvision train`, recipes/finetune_image_classification.py.

Read in this order: finetuning.py is the run, arguments.py what can be asked for, preparing.py how data and model are
made ready, outcome.py what is recorded and told.
"""

from .finetuning import audited_trainer, finetune


__all__ = ["audited_trainer", "finetune"]
