"""Networks: plain nn.Modules on torch; pretrained.py wraps those of torchvision and timm."""
