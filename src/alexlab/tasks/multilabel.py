"""Multi-label classification: an image may have any number of classes."""

from torch import Tensor

from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.metrics import MeanLoss


class MultiLabelClassifier(ImageClassifier):
    """Train `net` with targets float32 (B, num_classes): 1 for each class of the image, and 0 for the rest."""

    Sums = MeanLoss
    one_class_per_image = False

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def labels_of(self, targets: Tensor) -> Tensor:
        """Return 0 and 1, int64 (B, num_classes); targets between them, of mixed images, count as the nearer one."""
        return (targets > 0.5).long()
