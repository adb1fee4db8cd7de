"""Networks: plain nn.Modules, torch alone (and torchvision, timm in zoo.py)."""
