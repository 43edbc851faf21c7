// Draws a picture with the packages that `tiue-export coreml --swift-bundle` writes.
//
// Written on Linux and NOT RUN: no Mac was at hand, and it was not compiled either. It shows how
// little a runner needs: four models chained by the names of their tensors, one file of constants,
// no scheduler and no loop, as the decoder applies the closed formula itself.
//
// On a Mac with Xcode:
//     sh BUNDLE/coreml/compile.sh
//     swiftc -O apps/swift/tiue.swift -o tiue
//     ./tiue BUNDLE/coreml/Resources "a red fox in the snow" fox.png 0

import CoreGraphics
import CoreML
import Foundation
import ImageIO
import UniformTypeIdentifiers

struct Constants: Decodable {
    let height, width, latentHeight, latentWidth, tokenCount, padToken: Int
    let vaeScalingFactor: Double
    // The decoder has applied these already: latents = S * noise + sum over t of E_t * output_t.
    let timesteps: [Int]
    let noiseCoefficient: Double
    let outputCoefficients: [Double]
    let computeUnit: String
}

struct Failure: Error, CustomStringConvertible { let description: String }

/// CLIP's byte-pair encoding for plain English prompts, from vocab.json and merges.txt.
struct Tokenizer {
    let vocabulary: [String: Int]
    let ranks: [String: Int]

    init(resources: URL) throws {
        let vocab = try Data(contentsOf: resources.appendingPathComponent("vocab.json"))
        vocabulary = try JSONDecoder().decode([String: Int].self, from: vocab)
        let merges = try String(
            contentsOf: resources.appendingPathComponent("merges.txt"), encoding: .utf8)
        let lines = merges.split(separator: "\n").dropFirst()  // the first names the version
        ranks = Dictionary(
            lines.enumerated().map { (String($1), $0) }, uniquingKeysWith: { first, _ in first })
    }

    func encode(_ prompt: String, length: Int, pad: Int) throws -> [Int32] {
        guard let start = vocabulary["<|startoftext|>"], let end = vocabulary["<|endoftext|>"] else {
            throw Failure(description: "vocab.json is not CLIP's: it lacks <|startoftext|>")
        }
        let pattern = try NSRegularExpression(
            pattern: "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+")
        let text = prompt.lowercased()
        let matches = pattern.matches(in: text, range: NSRange(text.startIndex..., in: text))
        let words = matches.compactMap { Range($0.range, in: text).map { String(text[$0]) } }
        let pieces = words.flatMap(merged).compactMap { vocabulary[$0] }
        let ids = [start] + pieces.prefix(length - 2) + [end]
        return (ids + Array(repeating: pad, count: length - ids.count)).map(Int32.init)
    }

    /// Joins the pair of lowest rank until none is left.
    private func merged(_ word: String) -> [String] {
        var parts = word.map(String.init)
        if let last = parts.popLast() { parts.append(last + "</w>") }
        while parts.count > 1 {
            let pairs = (0..<parts.count - 1).map { (ranks["\(parts[$0]) \(parts[$0 + 1])"], $0) }
            guard let best = pairs.filter({ $0.0 != nil }).min(by: { $0.0! < $1.0! }) else { break }
            parts.replaceSubrange(best.1...best.1 + 1, with: [parts[best.1] + parts[best.1 + 1]])
        }
        return parts
    }
}

/// Normal noise by Box and Muller. It is not the noise that tiue-export makes of the same seed.
func noise(_ shape: [Int], seed: UInt64) throws -> MLMultiArray {
    let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float32)
    var state = seed &+ 0x9E37_79B9_7F4A_7C15
    func uniform() -> Double {  // xorshift64*
        state ^= state >> 12
        state ^= state << 25
        state ^= state >> 27
        return (Double((state &* 0x2545_F491_4F6C_DD1D) >> 11) + 0.5) / 9_007_199_254_740_992
    }
    for index in 0..<array.count {
        array[index] = NSNumber(value: sqrt(-2 * log(uniform())) * cos(2 * .pi * uniform()))
    }
    return array
}

/// Loads a model, runs it on what it asks for by name, and frees it: a phone holds one at a time.
func run(_ name: String, _ resources: URL, _ units: MLComputeUnits, _ pool: [String: MLMultiArray])
    throws -> [String: MLMultiArray]
{
    let settings = MLModelConfiguration()
    settings.computeUnits = units
    let place = resources.appendingPathComponent("\(name).mlmodelc")
    let model = try MLModel(contentsOf: place, configuration: settings)
    let wanted = model.modelDescription.inputDescriptionsByName.keys
    let missing = wanted.filter { pool[$0] == nil }
    guard missing.isEmpty else { throw Failure(description: "\(name) also needs \(missing)") }
    let inputs = try MLDictionaryFeatureProvider(dictionary: pool.filter { wanted.contains($0.key) })
    let outputs = try model.prediction(from: inputs)
    return Dictionary(
        uniqueKeysWithValues: outputs.featureNames.compactMap { feature in
            outputs.featureValue(for: feature)?.multiArrayValue.map { (feature, $0) }
        })
}

/// (1, 3, H, W) in [-1, 1] to a PNG file.
func writePNG(_ picture: MLMultiArray, _ constants: Constants, to path: String) throws {
    let (height, width) = (constants.height, constants.width)
    var pixels = [UInt8](repeating: 255, count: height * width * 4)
    for y in 0..<height {
        for x in 0..<width {
            for channel in 0..<3 {
                let index = [0, channel, y, x].map { NSNumber(value: $0) }
                let value = picture[index].doubleValue * 127.5 + 127.5
                pixels[(y * width + x) * 4 + channel] = UInt8(min(255, max(0, value.rounded())))
            }
        }
    }
    guard let provider = CGDataProvider(data: Data(pixels) as CFData),
        let image = CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32,
            bytesPerRow: width * 4, space: CGColorSpaceCreateDeviceRGB(),
            bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue),
            provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent),
        let file = CGImageDestinationCreateWithURL(
            URL(fileURLWithPath: path) as CFURL, UTType.png.identifier as CFString, 1, nil)
    else { throw Failure(description: "the picture could not be made") }
    CGImageDestinationAddImage(file, image, nil)
    guard CGImageDestinationFinalize(file) else { throw Failure(description: "cannot write \(path)") }
}

let arguments = CommandLine.arguments
guard arguments.count == 5, let seed = UInt64(arguments[4]) else {
    print("usage: tiue RESOURCES PROMPT PICTURE.png SEED")
    exit(2)
}
do {
    let resources = URL(fileURLWithPath: arguments[1])
    let file = try Data(contentsOf: resources.appendingPathComponent("tiue.json"))
    let constants = try JSONDecoder().decode(Constants.self, from: file)
    let units: [String: MLComputeUnits] = [
        "CPU_AND_GPU": .cpuAndGPU, "CPU_AND_NE": .cpuAndNeuralEngine, "CPU_ONLY": .cpuOnly,
    ]
    let unit = units[constants.computeUnit] ?? .all
    let ids = try Tokenizer(resources: resources).encode(
        arguments[2], length: constants.tokenCount, pad: constants.padToken)
    let tokens = try MLMultiArray(shape: [1, NSNumber(value: ids.count)], dataType: .int32)
    for (index, id) in ids.enumerated() { tokens[index] = NSNumber(value: id) }

    var pool = ["input_ids": tokens]
    pool["encoder_hidden_states"] = try run("TextEncoder", resources, unit, pool)["last_hidden_state"]
    pool["sample"] = try noise([1, 4, constants.latentHeight, constants.latentWidth], seed: seed)
    pool.merge(try run("UnetEncoder", resources, unit, pool)) { _, new in new }
    pool.merge(try run("UnetDecoder", resources, unit, pool)) { _, new in new }
    guard let latents = pool["latents"] else { throw Failure(description: "no latents") }
    for index in 0..<latents.count {
        let scaled = latents[index].doubleValue / constants.vaeScalingFactor
        latents[index] = NSNumber(value: scaled)
    }
    let picture = try run("VAEDecoder", resources, unit, ["latent_sample": latents])["sample"]
    guard let picture else { throw Failure(description: "no picture") }
    try writePNG(picture, constants, to: arguments[3])
} catch {
    print("error: \(error)")
    exit(1)
}
