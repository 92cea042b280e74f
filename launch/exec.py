"""Becomes the command given as arguments. DeepSpeed's MPICH helper starts Python files only."""

import os
import sys

os.execv(sys.argv[1], sys.argv[1:])
