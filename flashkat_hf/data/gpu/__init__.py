"""Decoding, cropping and augmentation of whole batches on a device."""
