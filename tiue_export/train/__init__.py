"""The reference path that trains: TiUE distillation in PyTorch (extra [train])."""
