"""The demo's teachers and captioner: pretrained towers aligned on the training pairs."""
