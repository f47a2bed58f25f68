"""All torch lives here. This page itself is torch-free: it only knows the names that planning and `deployopt list` need."""

TORCHVISION_ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
CIFAR_ARCHITECTURES = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
ARCHITECTURES = TORCHVISION_ARCHITECTURES + CIFAR_ARCHITECTURES
STEMS = ("imagenet", "small", "cifar")
