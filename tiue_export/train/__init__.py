"""The reference path that trains: distillation in PyTorch (extra [train])."""
