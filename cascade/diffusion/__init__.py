"""Continuous-time Gaussian diffusion on arrays [b, *d] of any rank.

This room is mathematics only: it knows no network, no text and no devices.

    process    schedules of the log signal-to-noise ratio, corruption, what a network may predict
    loss       the denoising loss and its weightings
    denoise    a Denoiser estimates x0; guidance and thresholding wrap one
    samplers   from noise to data, and by DDIM back again
    grids      which times a sampler visits
"""
