"""The likelihood of VAE, HMC-DGLM and L2HMC-DGLM over the number of MH steps."""
