"""Tasks that take a text alone: text to video, and text to image."""

from wan_dist.tasks.base import Task, TeaCacheFit
from wan_dist.tasks.published_dims import DIMS_1_3B, DIMS_T2V_14B, SIZES_480P, SIZES_720P

_TEA_FIT_T2V_14B = TeaCacheFit(
    (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), 0.10
)
TASKS = (
    Task(
        name="t2v-1.3B",
        repository="Wan-AI/Wan2.1-T2V-1.3B",
        transformer_dims=DIMS_1_3B,
        published_sizes=SIZES_480P,
        tea_fits=(
            TeaCacheFit(
                (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
                0.05,
            ),
        ),
    ),
    Task(
        name="t2v-14B",
        repository="Wan-AI/Wan2.1-T2V-14B",
        transformer_dims=DIMS_T2V_14B,
        published_sizes=SIZES_720P,
        tea_fits=(_TEA_FIT_T2V_14B,),
    ),
    Task(
        name="t2i-14B",
        repository="Wan-AI/Wan2.1-T2V-14B",
        transformer_dims=DIMS_T2V_14B,
        published_sizes=(*SIZES_720P, (1024, 1024)),
        is_still=True,
        tea_fits=(_TEA_FIT_T2V_14B,),
    ),
    Task(
        name="t2v-A14B",
        repository="Wan-AI/Wan2.2-T2V-A14B",
        transformer_dims=DIMS_T2V_14B,
        expert_boundary=0.875,
        published_sizes=SIZES_720P,
    ),
)
