"""transformers' ImageProcessingTestMixin on both image processors."""

import unittest

import numpy as np
import pytest
from transformers_upstream.test_image_processing_common import ImageProcessingTestMixin, prepare_image_inputs

from hf_vicreg import BigBirdViTImageProcessor, BigBirdViTImageProcessorPil

pytestmark = pytest.mark.upstream


class ProcessorTester:
    """Makes settings of the processors and images of random sizes for them."""

    batch_size = 5
    num_channels = 3

    def prepare_image_processor_dict(self) -> dict:
        return {
            "do_resize": True,
            "size": {"height": 20, "width": 28},
            "do_normalize": True,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.4],
        }

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=120,
            equal_resolution=equal_resolution,
            numpify=numpify,
            torchify=torchify,
        )

    def prepare_processor_inputs(self, **kwargs) -> dict:
        return {"images": self.prepare_image_inputs(**kwargs)}

    def expected_output_image_shape(self, images) -> tuple[int, int, int]:
        return self.num_channels, 20, 28


class TestImageProcessors(ImageProcessingTestMixin, unittest.TestCase):
    """Both backends, alone and against each other."""

    # upstream looks these up by the name of the folder that a test is in
    image_processing_classes = {"torchvision": BigBirdViTImageProcessor, "pil": BigBirdViTImageProcessorPil}  # noqa: RUF012
    test_cast_dtype = True

    def setUp(self):
        np.random.seed(0)  # upstream draws the images from the global generator
        self.image_processor_tester = ProcessorTester()

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()
