"""stable-diffusion-x4-upscaler, which stands behind DeepFloyd IF as stage III."""
