"""The table of published checkpoints, checksums, and the Hub's errors in one line."""

import hashlib

import httpx2 as httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from flashkat_hf import published
from flashkat_hf.published import PUBLISHED, check_sha256, download
