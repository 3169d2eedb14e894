"""Dims of the published models that tasks share, and the sizes that they were published for."""

from dataclasses import replace

from wan_dist.models.dims import (
    AudioEncoderDims,
    FaceEncoderDims,
    ImageEncoderDims,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)

DIMS_1_3B = TransformerDims(num_layers=30, dim=1536, ffn_dim=8960, num_heads=12)
DIMS_5B = TransformerDims(
    num_layers=30, dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48
)
DIMS_T2V_14B = TransformerDims(num_layers=40, dim=5120, ffn_dim=13824, num_heads=40)
DIMS_VACE_1_3B = replace(DIMS_1_3B, vace_layers=tuple(range(0, 30, 2)), vace_in_dim=96)
DIMS_VACE_14B = replace(DIMS_T2V_14B, vace_layers=tuple(range(0, 40, 5)), vace_in_dim=96)
DIMS_WAV2VEC_XLSR = AudioEncoderDims(
    num_layers=24,
    dim=1024,
    ffn_dim=4096,
    num_heads=16,
    conv_dims=(512,) * 7,
    conv_kernels=(10, 3, 3, 3, 3, 2, 2),
    conv_strides=(5, 2, 2, 2, 2, 2, 2),
    position_taps=128,
    position_groups=16,
)
DIMS_S2V_14B = replace(
    DIMS_T2V_14B,
    audio_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
    audio_dim=1024,
    num_audio_states=25,
    num_audio_tokens=4,
)
DIMS_I2V_A14B = replace(DIMS_T2V_14B, in_dim=36)
DIMS_I2V_14B = replace(DIMS_I2V_A14B, image_dim=1280)
DIMS_FLF2V_14B = replace(DIMS_I2V_14B, image_positions=2 * 257)
DIMS_ANIMATE_14B = replace(DIMS_I2V_14B, face_layers=tuple(range(0, 40, 5)), pose_dim=16)
DIMS_ANIMATE_FACE = FaceEncoderDims(out_dim=5120)
DIMS_TOY = TransformerDims(
    num_layers=7, dim=192, ffn_dim=512, num_heads=6, text_dim=128, text_len=64
)
DIMS_UMT5_XXL = TextEncoderDims(
    num_layers=24, dim=4096, ffn_dim=10240, num_heads=64, head_dim=64, vocab_size=256384
)
DIMS_TOY_UMT5 = TextEncoderDims(
    num_layers=2, dim=128, ffn_dim=256, num_heads=4, head_dim=32, vocab_size=640
)
DIMS_CLIP_H = ImageEncoderDims(
    num_layers=32, dim=1280, ffn_dim=5120, num_heads=16, patch=14, image_size=224
)
DIMS_VAE_21 = VaeDims(dim=96, decoder_dim=96)
DIMS_VAE_22 = VaeDims(dim=160, decoder_dim=256, latent_dim=48, residual=True)
SIZES_480P = ((832, 480), (480, 832))
SIZES_720P = (*SIZES_480P, (1280, 720), (720, 1280))
SIZES_S2V = (*SIZES_720P, (1024, 704), (704, 1024), (1280, 704), (704, 1280))
SIZES_704P = ((1280, 704), (704, 1280))
