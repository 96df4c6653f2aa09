"""State-space duality: one linear map, computed several ways."""

from mamba2_min.ssd.plain import ssd_chunked, ssd_quadratic, ssd_recurrent, ssd_step

__all__ = ["ssd_chunked", "ssd_quadratic", "ssd_recurrent", "ssd_step"]
