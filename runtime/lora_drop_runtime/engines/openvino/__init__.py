"""OpenVINO on the CPU: both steps in one compiled model over paged caches."""
