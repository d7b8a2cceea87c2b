"""Data sets as uint8 tensors, their splits, and batched augmentation."""

from gsem.data.arrays import from_arrays as from_arrays
from gsem.data.augment import crop_flip as crop_flip
from gsem.data.augment import resized_crop as resized_crop
from gsem.data.augment import to_float as to_float
from gsem.data.autoaugment import auto_augment as auto_augment
from gsem.data.autoaugment import cutout as cutout
from gsem.data.corruptions import load_corruptions as load_corruptions
from gsem.data.dataset import Dataset as Dataset
from gsem.data.dataset import Split as Split
from gsem.data.huggingface import from_huggingface as from_huggingface
from gsem.data.images import DamagedImage as DamagedImage
from gsem.data.images import Images as Images
from gsem.data.items import from_torch as from_torch
from gsem.data.mixing import mixed_order as mixed_order
from gsem.data.mixing import read_extra as read_extra
from gsem.data.registry import DATASETS as DATASETS
from gsem.data.registry import as_dataset as as_dataset
from gsem.data.registry import load as load
from gsem.data.registry import load_test as load_test
from gsem.data.subset import balanced as balanced
