from pallas_kernels.delta_rule.gpu.operation import delta_rule
